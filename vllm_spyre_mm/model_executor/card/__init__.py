# SPDX-License-Identifier: Apache-2.0
"""The card's backend: its two graphs and their inputs."""
