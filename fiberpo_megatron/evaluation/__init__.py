"""This package measures a policy on named sets of prompts: settings, estimators with intervals, results as JSON."""
