"""`kvloom calibrate`: fitting a method to a model."""
