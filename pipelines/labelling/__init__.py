"""People judge answers: a session of items, a journal of judgements, a page, and preferences for the inbox."""
