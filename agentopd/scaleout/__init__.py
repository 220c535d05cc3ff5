"""Workers on other machines, as Ray actors behind the protocols that parts in this process have.

Import the modules themselves: a judge's machine needs no torch.
"""
