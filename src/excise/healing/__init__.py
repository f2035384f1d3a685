"""Healing a pruned model: closed-form repair, and distillation from the original."""
