"""A package of the operator's, as a project of several modules has one."""
