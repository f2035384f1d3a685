"""Closed-form repair of what a removal breaks, folded into kept matrices."""
