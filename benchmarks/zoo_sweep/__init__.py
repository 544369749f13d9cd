"""Every generating class of the installed transformers, small, decoded by us and judged by transformers' own step."""
