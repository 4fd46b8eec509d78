"""`fiberpo doctor` checks whether this machine, its software and a config can run, and names the fix for what cannot.

Each module holds one group of checks. A check is a function that returns findings.
"""
