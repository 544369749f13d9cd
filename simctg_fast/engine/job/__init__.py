"""A file of requests in, a file of results out: read, written line by line, resumed, merged and summed up."""
