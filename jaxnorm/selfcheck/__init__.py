"""`jaxnorm selfcheck`: is the kernel right on this machine, and how fast is it?

command.py runs the entries of plan.py, each of which has a case of cases.py and a process of its own (process.py):
numbers.py, races.py or times.py. report.py makes tables of what they found, and says what it proves.
"""
