"""nbgrader's settings for the course on model merging; everything else is at nbgrader's defaults."""
import os

from tsv_nb.course.autograder import configure

c = get_config()  # noqa: F821 - nbgrader defines it

# Time limit of one cell in seconds (a hanging cell loses its points, the others are graded), and the memory that a submission may allocate, in GiB.
configure(c, seconds=int(os.environ.get("TSV_COURSE_SECONDS", 60)), memory=float(os.environ.get("TSV_COURSE_MEMORY", 4)))
