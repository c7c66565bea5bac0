"""Recipes: one function per run. The only floor that knows every name.

`options` holds what a user can choose, as typed fields, and imports no tensor library, so that the
command line can show them at once; the other modules turn options into a `Recipe`.
"""
