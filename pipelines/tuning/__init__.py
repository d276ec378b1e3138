"""Equal tuning: the same number of trials for every algorithm, chosen on prompts that the report does not use."""
