"""Who does a plan's jobs, and where: this process, this machine, a cluster."""
