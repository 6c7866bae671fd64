"""What is beside the recipe. (With this file a package of the same name elsewhere on Python's path is not taken for it.)"""
