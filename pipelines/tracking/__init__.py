"""Copy journals to MLflow: missing values are added, and no value is stored twice."""
