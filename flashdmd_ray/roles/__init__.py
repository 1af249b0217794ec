"""The verbs of the algorithm, as plain torch classes: no Ray, no handles to one another, seeds as arguments."""
