"""Small networks that are trained: suite=mlp and suite=lm."""
