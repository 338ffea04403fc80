"""What `bench.py` measures beside a whole training: operations, matrix products, small models, parts of the model."""
