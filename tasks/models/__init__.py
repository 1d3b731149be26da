"""Parts of models and of their training that the task families share."""
