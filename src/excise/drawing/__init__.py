"""Charts as SVG: one drawing for the page, light and dark, wide and narrow, and for files of their own."""
