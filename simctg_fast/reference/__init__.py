"""The slow, obvious version of every operator, for tests and benchmarks to compare with. Nothing else imports it."""
