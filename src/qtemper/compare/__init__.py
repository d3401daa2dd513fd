"""`qtemper compare`: a grid of runs that resumes where it stopped, and the table that it gives at any moment.

`grid` says which runs there are and in which order, `schedule` runs them in processes of their own, `record` reads
what they left, `table` makes the statistics of it.
"""
