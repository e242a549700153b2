"""What a model of the family is made of: the weight table, configuration checks, model families."""
