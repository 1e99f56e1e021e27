"""One job: from its record to its artifact."""
