"""This package shows on the machine at hand that results do not depend on layout, micro-batches or order.

`fiberpo certify` and `fiberpo replay-step` are its commands; docs/certify.md describes them.
"""
