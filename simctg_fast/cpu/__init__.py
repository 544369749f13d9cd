"""What stands in for a model's modules on the CPU: forwards put into them for a while, and taken out again."""
