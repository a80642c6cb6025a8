"""noxctl: what plain ansible-playbook can't do for a fleet. Progress, waves with gates, a journal, resume, reports.

Every change on a host is made by a playbook of this project; noxctl only decides when, where, and whether to go on.
"""
