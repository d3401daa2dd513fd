"""`qtemper compare`: a grid of runs that resumes where it stopped, and the table that it gives at any moment.

`grid` says which runs there are and in which order, `schedule` has several of them under way, `launch` starts them as
processes and `slurm` as a cluster's jobs, `record` reads what they left, `table` makes the statistics of it. `sweep`,
for `qtemper sweep`, does the same with trials that Optuna proposes.
"""
