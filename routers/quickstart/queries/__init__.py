"""Query families of the quickstart pool: generators of short questions with verifiable answers, and their grader."""

from routers.quickstart.queries.build import FAMILIES, Query, build_queries
from routers.quickstart.queries.grade import extract_answer, grade

__all__ = ["FAMILIES", "Query", "build_queries", "extract_answer", "grade"]
