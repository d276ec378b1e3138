"""Validate tables before training: Great Expectations suites per table, a policy per rule, quarantine and report."""
