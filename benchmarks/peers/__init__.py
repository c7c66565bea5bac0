"""What is measured side by side: one module for each project, each with a `contestants` function.

The parameter `setting` says the network and the batch, `device` where; what comes back is a list
of `Contestant`s, or `Absent` is raised with the reason why there are none.
"""
