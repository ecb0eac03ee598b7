"""How the demo checkpoint is made: a scene language, the training of every part, and the check of what it draws."""
