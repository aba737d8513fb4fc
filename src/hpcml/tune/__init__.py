"""``hpcml tune``: short trials of a job, a search over its settings for speed, the winner into the job file.

``space`` says what is searched, ``search`` in which order, ``trial`` runs the job, ``tuner`` puts these together, ``write``
changes the job file, ``picture`` draws what mattered.
"""
