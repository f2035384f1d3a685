"""Bridges to other people's solvers and file formats, each behind an extra; importing one imports none of them."""
