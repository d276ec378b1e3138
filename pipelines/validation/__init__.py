"""What may enter training: suites of Great Expectations per table, policies per rule, quarantine and report."""
