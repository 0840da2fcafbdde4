"""Compressing a model: the job, the recipe, the loop, the guard, the report."""
