# SPDX-License-Identifier: Apache-2.0
"""Tuning with MetaSchedule: tasks and spaces, search, measuring in a worker process, records. Needs extra ``tune``."""
