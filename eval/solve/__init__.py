"""Finding schedules: which precision a prompt and each decode step may have at no loss (PMPD paper, Section 4)."""
