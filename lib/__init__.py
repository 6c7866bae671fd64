"""The machinery beside the recipe. This file makes lib a package, so that no other `lib` on Python's path is
imported instead."""
