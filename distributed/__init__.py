"""Studies of attention as regression, scheduled in this process or by Ray, and the reports they write."""
