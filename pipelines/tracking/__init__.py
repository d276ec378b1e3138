"""MLflow as a projection of journals: what the store does not hold yet is added, and nothing is ever there twice."""
