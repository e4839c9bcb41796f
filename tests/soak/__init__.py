"""Hours of starts, kills and resumes, with the real commands.

make soak                       an hour of trainings that are killed at random moments, then a table whose runs fail
make soak ARGS="minutes=1"      the same in small
"""
