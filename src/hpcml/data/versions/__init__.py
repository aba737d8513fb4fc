"""Versions of data sets: DVC keeps the content, Git's tags name it, jobs read it from a folder of its own.

``repository`` does what a person asks for, ``material`` lays a version out for jobs, ``jobs`` decides which version a job
reads, and ``receipt`` is what a node checks it by.
"""
