"""What every optimizer of this package is: groups, the phases of a step, update rules."""
