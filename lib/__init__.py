"""What is beside the recipe. With this file no other package of this name, elsewhere on Python's path, is
taken for it."""
