"""Weights from and to disk: pretrained bases, merged models and PEFT folders.

It may import training, model, adapters and the rooms below them.
"""
