"""`fiberpo doctor`: whether this machine, its software and a config can run, with the fix for what cannot.

One module a group of checks; each check is a function without arguments of its own that returns findings.
"""
