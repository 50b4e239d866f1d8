"""A trained or training federation outside the simulation."""
