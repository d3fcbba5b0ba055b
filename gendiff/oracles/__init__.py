"""Oracles of validity: functions of a batch that return a Boolean per sample; any black box on the host will do."""
