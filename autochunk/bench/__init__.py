"""The benchmark behind ``autochunk bench``; ``docs/benchmark.md`` says what its figures mean.

``import autochunk`` does not import it. In the order of a run:

=====================  =========================================================================
``cli``                the command: from settings to tables, JSON and charts
``parser, arguments``  the options, and what makes no sense about them
``suite``              the sizes of known models
``cases``              what travels between processes: cases, variants of methods, jobs
``measure, breaking``  which child processes run, and what becomes of what they say
``processes, child``   a child process from its parent's side, and from its own
``problems, losses``   tensors and a step of a case; losses as functions of logits
``methods, steps``     the table of methods, and one function for each
``memory``             peak memory, and a limit on it
``search, summary``    pure functions: bisection; medians, ratios, the Pareto curve
``results``            raw results, and the JSON file
``tables, charts``     what a person reads; ``drawing`` and ``progress`` are their tools
``environment``        the machine, and versions of packages
=====================  =========================================================================
"""
