# SPDX-License-Identifier: Apache-2.0
"""What the card wants: its two graphs and their inputs."""
