"""One file a method, and its recipe beside it. The registry finds them by file name; nothing is listed
anywhere."""
